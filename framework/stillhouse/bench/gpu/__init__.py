"""`make gpu`: all that needs a GPU, in parts, each a process with a time limit.

`session` runs the parts, which write down what `findings` describes. The parts are in `checks`,
`ratios`, `teacher` and `live_run`, and take their sizes from `scale`. Each is imported when it
runs, so a part needs no more packages than its own.
"""
