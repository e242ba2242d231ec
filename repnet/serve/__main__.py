"""`repnet serve`: answer HTTP requests with a deploy model, in any of its formats.

Exit codes: 0 stopped by SIGTERM, 2 bad input, 130 interrupted. The server first
answers the requests that it has begun.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from repnet.errors import InputError

_PACKAGES = ("starlette", "uvicorn", "python_multipart", "prometheus_client")
_HELP = {
    "requests": "requests that are read, wait or run; more are refused with 503",
    "timeout": "seconds until a request is answered with 504",
    "request_bytes": "bytes of a request",
    "request_images": "images of a request",
    "request_pixels": "pixels of all images of a request",
    "pixels": "pixels of all images in memory at once, about 10 bytes each; more images wait",
    "batch": "images that the network sees at once",
}


def main() -> None:
    """Run the command."""
    arguments = _parser().parse_args()
    # After a signal, the server answers what it has begun and raises the signal again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        _serve(arguments)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _serve(arguments: argparse.Namespace) -> None:
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise InputError(f'serve needs {", ".join(missing)}: pip install "repnet[serve]"')
    import numpy as np
    import uvicorn

    from repnet.predict import Predictor
    from repnet.serve.app import create_app
    from repnet.serve.limits import Limits

    limits = Limits(**{name: getattr(arguments, name) for name in _HELP})
    predictor = Predictor(arguments.artefact, trust=arguments.trust, device=arguments.device)
    blank = np.zeros((predictor.channels, predictor.height, predictor.width), np.uint8)
    for images in ([blank], [blank] * 2):  # a broken model does not even start
        predictor.predict(images)
    app = create_app(predictor, limits)
    where = f"{arguments.host}:{arguments.port}"
    try:
        family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
        listener = socket.create_server((arguments.host, arguments.port), family=family)
    except OSError as error:
        raise InputError(f"cannot listen on {where}: {error.strerror}; see --port") from error
    with listener:
        host, port = listener.getsockname()[:2]
        print(f"serving {arguments.artefact} at http://{host}:{port}", flush=True)
        received: list[int] = []

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                received.append(sig)
                super().handle_exit(sig, frame)

        config = uvicorn.Config(app, log_level="warning", lifespan="on")
        Server(config).run(sockets=[listener])
    if signal.SIGINT in received:  # raised again while the event loop ends, it may be lost
        raise KeyboardInterrupt


def _positive(kind: type) -> type:
    def convert(text: str) -> float:
        number: float = kind(text)
        if not 0 < number < float("inf"):
            raise ValueError
        return number

    convert.__name__ = "positive number"  # argparse: "invalid positive number value: '0'"
    return convert  # type: ignore[return-value]


def _parser() -> argparse.ArgumentParser:
    from repnet.serve.limits import Limits

    parser = argparse.ArgumentParser(
        prog="repnet serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "artefact", metavar="ARTEFACT", type=Path, help="directory of deploy.py, or a file in it"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of the network (default: %(default)s)")
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="package that may be imported to build the network; native: run files that are code",
    )
    for field in fields(Limits):
        assert field.default is not MISSING
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_positive(type(field.default)),
            default=field.default,
            metavar="N",
            help=f"{_HELP[field.name]} (default: {field.default:,})",
        )
    return parser


if __name__ == "__main__":
    main()
