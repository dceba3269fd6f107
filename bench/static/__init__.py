"""What compiled kernels say about their speed, without a GPU: `python -m bench static`.

Every shipped Triton and CUDA kernel is compiled at its target shape, and its machine code is read:

- `chips`: the rates of A100, H100, H200 and B200, with their sources;
- `launches`: the launches at target shapes; `compiling`: a launch as machine code; `cuda`: the same of csrc/*.cu;
- `sass`: machine code as instructions, loops and widths of accesses; `pipes`: the clocks of a loop by execution unit;
- `waits`: the bytes in flight while one block waits for memory; `occupancy`: blocks a multiprocessor;
- `attention`: the tiles of each program of attention, in the order in which the programs start;
- `model`: the bound and the predicted share of a ceiling; `calibration`: predictions beside published measurements;
- `table`: JSON and Markdown.

Nothing here is a measurement: every figure is read from machine code or predicted, and marked so.
"""
