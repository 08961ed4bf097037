"""Evaluation tasks, one per module, and the code that reads and runs them.

`task.py` defines the interface of a task, which `readers.py`, `runner.py` and the report call;
`single_label.py` and `class_prompts.py` hold parts that several tasks share. Every other module is
one task.
"""
