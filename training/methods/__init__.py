"""The methods of the papers on independent axes: objective, step, quantizer and average.

A method is one choice on each axis. Each choice is a short class that knows nothing of the other axes, names its
paper and equation, and has `state_dict` and `load_state_dict`: a run goes on at any update as if it had never stopped.
"""
