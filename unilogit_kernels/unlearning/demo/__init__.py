"""The demo: a small pretrained model learns facts about invented sellers and forgets some again.

Run it with `python -m unilogit_kernels.unlearning.demo --output DIR`; it needs no network.
"""
