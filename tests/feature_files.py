"""Weight files for the tests of feature networks."""

import hashlib
import io
import urllib.error

import torch


def hub_file(folder, stem, state, *, digest=None):
    """`stem`-DIGEST.pth in `folder`, as torch hub names it."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "new"
    torch.save(state, temporary)
    digest = digest or hashlib.sha256(temporary.read_bytes()).hexdigest()[:8]
    return temporary.rename(folder / f"{stem}-{digest}.pth")


class Server:
    """Stands for urllib.request.urlopen: gives `content`, or breaks off after `breaks_after` bytes."""

    def __init__(self, content, breaks_after=None):
        self.content, self.breaks_after, self.asked = content, breaks_after, []

    def __call__(self, url, timeout):
        self.asked.append(url)
        if self.content is None:
            raise urllib.error.URLError("Name or service not known")
        response = io.BytesIO(self.content[: self.breaks_after])
        response.headers = {"Content-Length": str(len(self.content))}
        return response
