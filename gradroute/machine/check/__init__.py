"""`python -m gradroute check`: every op on every backend of this machine, proved against the reference.

`cases` says what is checked, with groups of cases in `larger` and `around_vendors`. `trials` makes the calls, and
`judging` finds what is wrong with one; `buffers`, `far_rows` and `on_cuda` have the ways that take more than a run.
`workers` runs it all in processes that may die, `findings` counts and words what came of it, `keeping` says what that
makes of an earlier verdict, and `command` is the command.
"""
