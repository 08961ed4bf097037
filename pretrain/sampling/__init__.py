"""Schedule of a run, sample order and source mixing: pure functions of the step."""
