"""Prints, as JSON, all that a script can see of how it was started."""

import atexit
import json
import os
import pickle
import sys
from dataclasses import dataclass

import __main__

MARK = "kept until the end"


@dataclass
class Record:
    value: int


def at_exit():
    main = sys.modules["__main__"]
    print(json.dumps({"at exit": [getattr(main, "MARK", None), main.__dict__ is globals()]}))


if __name__ == "__main__":
    atexit.register(at_exit)
    main = sys.modules["__main__"]
    spec = main.__spec__
    print(
        json.dumps(
            {
                "argv": sys.argv,
                "path": sys.path[:2],
                "folder": os.getcwd(),
                "name": __name__,
                "file": __file__,
                "package": __package__,
                "doc": __doc__,
                "spec": spec and [spec.name, spec.origin],
                "loader": [type(__loader__).__name__, getattr(__loader__, "path", None)],
                "builtins": type(__builtins__).__name__,
                "main is this module": [main.__dict__ is globals(), main is __main__],
                "no other names": sorted(name for name in globals() if not name.startswith("_")),
                "pickled": pickle.loads(pickle.dumps(Record(3))) == Record(3),
                "flags": [sys.flags.isolated, sys.flags.optimize],
            }
        )
    )
    if "--exit" in sys.argv:
        sys.exit(int(sys.argv[-1]))
    if "--raise" in sys.argv:
        raise KeyError("from the script")
