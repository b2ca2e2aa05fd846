"""Tools to break the disk under lastgood, and under what is built on it.

    with using(Faulty("17:EIO")) as disk:       # the 17th call that changes the disk fails
        manager.save(...)

`Fault` says what happens at which call, `Faulty` does it, `Crash` is how a process dies in the middle of one.
`Recorder` writes down the calls of an operation, and `cuts` gives every state of the disk that a power cut
in it could leave. All is deterministic: a failure is replayed from the text of its fault, or the number of its state.
"""

from lastgood.store.fs import FileSystem, using
from lastgood.testing.faults import Crash, Fault, Faulty
from lastgood.testing.power import Cut, Model, cuts
from lastgood.testing.trace import Recorder

__all__ = ["Crash", "Cut", "Fault", "Faulty", "FileSystem", "Model", "Recorder", "cuts", "using"]
