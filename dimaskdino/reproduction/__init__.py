"""Redo the paper's tables and its Figure 1: their numbers, the runs behind them, costs, jobs, reports, charts."""
