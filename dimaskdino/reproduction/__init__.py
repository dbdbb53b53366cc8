"""Reproduce the papers' tables: their numbers, the runs behind them, what these cost, jobs, reports, and charts."""
