"""`python -m gradroute tune`: measures here what is shipped as an estimate, for the automatic choice to follow.

`questions` lists what is asked about a device, in the order of its worth; `of_backends`, `of_products`, `of_attention`
and `of_kernels` have the questions of their kinds. `measuring` verifies candidates before it times them, and has the
rule by which one is faster; `session` asks and writes, `lines` says what it does, and `command` is the command.
"""
