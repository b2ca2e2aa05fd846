"""What a run will put onto the disk, before it is started: `lastgood.plan(...)`. No torch but where shapes need it."""
