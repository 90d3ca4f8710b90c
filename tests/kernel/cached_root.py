"""virtme-run, with a guest that caches the files of its root: nobody changes them meanwhile.

Without it each exec of a program reads the program again from the host: with it
shells start in half of the time there, and so does Python. virtme-ng's Python
runs this.
"""

import sys

from virtme import mkinitramfs
from virtme.commands import run

OPTIONS = "trans=virtio,access=any,"

if __name__ == "__main__":
    assert OPTIONS in mkinitramfs._MOUNT_ROOT_HOST
    mkinitramfs._MOUNT_ROOT_HOST = mkinitramfs._MOUNT_ROOT_HOST.replace(
        OPTIONS, f"{OPTIONS}cache=loose,"
    )
    sys.exit(run.main())
