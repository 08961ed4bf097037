"""Sample order and source mixing as pure functions of the step."""
