"""How commands that are clients of a server check who it is: by the system's authorities, a file's, or not at all."""

from __future__ import annotations

import argparse
import ssl

from lockstep.cli.errors import UsageError

ADVICE = "if it is the server's own certificate, give it (or who signed it) with --ca-cert FILE; --insecure does without the check"


def add_tls_flags(parser: argparse.ArgumentParser) -> None:
    """The flags whose values `client_context` takes."""
    parser.add_argument("--ca-cert", metavar="FILE", help="certificates (PEM) to trust for https, instead of the system's")
    parser.add_argument("--insecure", action="store_true", help="take any certificate")


def client_context(ca_cert: str | None, insecure: bool) -> ssl.SSLContext:
    """For connections to an https address. Raises UsageError for a file that holds no certificate, and for both flags."""
    if ca_cert is not None and insecure:
        raise UsageError("--ca-cert with --insecure: one checks the certificate and the other does not; leave one out.")
    try:
        context = ssl.create_default_context(cafile=ca_cert)
    except (OSError, ssl.SSLError) as e:
        raise UsageError(f"--ca-cert={ca_cert} cannot be used ({e}): give a file of certificates in PEM.") from None
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def certificate_problem(error: object) -> str:
    """What is wrong with a server's certificate, and how to go on; "" when this error is about something else."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        return ""
    return f"its certificate is not trusted ({error.verify_message.rstrip('.')}): {ADVICE}."
