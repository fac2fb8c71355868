"""torch's distributed checkpoints (``.metadata`` + ``.distcp``), read without torch or pickle."""
