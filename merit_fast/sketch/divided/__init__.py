"""Models of whose parameters a process has all values only while their modules run.

FSDP2 (``fully_shard``) gathers them from all processes, accelerate's hooks bring them from memory
or disk. The sketcher follows each parameter's forms, and keeps processes in step.
"""
