"""Remote runs: the same code, with a model whose weights are on another machine.

    model = DiffusionModel("diffsight/shapes-clip", remote="http://127.0.0.1:8000")
    with model.generate("a red circle", seed=17) as run:
        run.text_encoder.ln_final.input = run.text_encoder.layers[4].output
    run.images

The body runs on the client, the model on the server. No code is sent, only points, values and errors; see `protocol`.
Start a server with `diffsight serve MODEL`.
"""

from diffsight.remote.chunks import Chunks, split
from diffsight.remote.on_server import is_on_server, put_on_server
from diffsight.remote.protocol import VERSIONS, job_frames, says_error
from diffsight.remote.run_session import RunEnded, RunSession, check_harmless, error_frame
from diffsight.remote.selections import sent_as
from diffsight.remote.served_model import Job, ServedModel
from diffsight.remote.wire_errors import RemoteError
from diffsight.remote.wire_values import Held, ProtocolError, can_be_sent

__all__ = [
    "VERSIONS",
    "Chunks",
    "Held",
    "Job",
    "ProtocolError",
    "RemoteError",
    "RunEnded",
    "RunSession",
    "ServedModel",
    "can_be_sent",
    "check_harmless",
    "error_frame",
    "is_on_server",
    "job_frames",
    "put_on_server",
    "says_error",
    "sent_as",
    "split",
]
