"""The harness that shows what lastgood promises: every operation, broken at every call and looked at afterwards."""
