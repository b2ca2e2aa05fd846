"""The main job, shown: a fine-tune that is killed during a save and ends as if it never was."""
