"""One rank of a job on two hosts: a module run as a script, with its output kept.

    python rank_main.py FOLDER MODULE ARGUMENTS..

Writes FOLDER/output.<rank>, which a broken link does not swallow, and at the module's
end FOLDER/routes.<rank>: {peer: UCX transports that carry the messages to it}.
"""

import json
import os
import pathlib
import runpy
import sys


def main() -> None:
    folder, module, *arguments = sys.argv[1:]
    rank = os.environ["HOROVOD_RANK"]
    output = os.open(f"{folder}/output.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    print(f"process {os.getpid()}", flush=True)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")

    import smp_tf as smp
    from smp_tf.runtime import session

    engine = session.current("describe").engine
    routes = {p: engine.describe(p) for p in range(smp.size()) if p != smp.rank()}
    pathlib.Path(folder, f"routes.{rank}").write_text(json.dumps(routes))


if __name__ == "__main__":
    main()
