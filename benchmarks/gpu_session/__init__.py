"""A few minutes on a GPU, used to the full: what runs, what is right, how fast, what to change.

`python -m benchmarks.gpu_session --minutes 8 --out DIR` needs torch, and triton for its kernels;
whatever else is missing is named and passed over. See docs/gpu.md.

The parent process (`session`) imports nothing but the standard library. It hands cases to child
processes (`child`), kills those that overrun, writes down each result as it comes (`ledger`), and
after each stage a summary (`summary`).
"""
