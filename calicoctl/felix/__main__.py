"""The agent's background process: `python -m calicoctl.felix OPTIONS`, started only by process.start().

OPTIONS is process.Options in JSON.
"""

import json
import sys
import traceback

from calicoctl import programs, slim

slim.install()
programs.look_in_system_folders()

from calicoctl.datastore.hosts import hostname  # noqa: E402
from calicoctl.errors import CalicoError  # noqa: E402
from calicoctl.felix import agent, process  # noqa: E402

try:
    agent.run(hostname(), process.Options(**json.loads(sys.argv[1])))
except CalicoError as error:
    print(error, file=sys.stderr)
    process.leave(1)
except BaseException:
    traceback.print_exc()
    process.leave(1)
process.leave(0)
