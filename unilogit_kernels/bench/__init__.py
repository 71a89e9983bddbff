"""The benchmark harness: problems, providers, measurements, reports.

Run it with `unilogit bench`. Every time stands beside the error against float64 of what was timed,
and every ratio comes from runs that alternate in one process.
"""
