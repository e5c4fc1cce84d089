"""From a request to a trained run: forecast, self-check, steps, hooks. Prints nothing; a callback
is told what happens.
"""
