"""This machine: what it is, and what `python -m gradroute check` and `tune` found out about it.

`identity` says what it is, `records` where findings are kept. The choice of a backend reads them through `verdicts` and
`answers`, each device's file once, at the first call there. `check/` and `tune/` are the commands, and `report` is
`python -m gradroute` itself.
"""
