"""A forwarder of TCP, as `ssh -R` is one: a site dials out to it, and others reach the site through it.

python forwarder.py serve INNER OUTER ...    # pairs of ports: what arrives at OUTER goes to who has dialled INNER
python forwarder.py site HOST INNER PORT     # at the site: dials INNER of HOST, and joins what comes with PORT
"""

import asyncio
import contextlib
import subprocess
import sys


@contextlib.contextmanager
def forwarding(network, machine, port, outer):
    """A forwarder on a machine of `network.Network`, and the connections of sites to it.

    Args:
        port: that every site listens on.
        outer: name of a site -> the machine's port through which others reach it.
    """

    def run(name, *arguments, **options):
        command = ("ip", "netns", "exec", network.namespace(name), sys.executable, __file__, *map(str, arguments))
        made = subprocess.Popen(command, **options)
        leave.callback(made.wait)
        leave.callback(made.kill)
        return made

    with contextlib.ExitStack() as leave:
        ports = [number for each in outer.values() for number in (each + 1000, each)]
        serving = run(machine, "serve", *ports, stdout=subprocess.PIPE, text=True)
        assert serving.stdout.readline() == "ready\n"
        for name, each in outer.items():
            run(name, "site", network.address(machine), each + 1000, port)
        yield


async def _pump(reader, writer):
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _join(one, other, first=b""):
    other[1].write(first)
    await asyncio.gather(_pump(one[0], other[1]), _pump(other[0], one[1]))


async def _serve(ports):
    for inner, outer in zip(ports[::2], ports[1::2], strict=True):
        waiting = asyncio.Queue()

        async def dialled(reader, writer, waiting=waiting):
            await waiting.put((reader, writer))

        async def arrived(reader, writer, waiting=waiting):
            await _join((reader, writer), await waiting.get())

        await asyncio.start_server(dialled, "0.0.0.0", inner)
        await asyncio.start_server(arrived, "0.0.0.0", outer)
    print("ready", flush=True)
    await asyncio.Event().wait()


async def _site(host, inner, port):
    joined = set()
    while True:
        reader, writer = await asyncio.open_connection(host, inner)
        first = await reader.read(65536)  # nothing until somebody has come
        try:
            near = await asyncio.open_connection("127.0.0.1", port)
        except OSError:  # nobody listens there yet
            writer.close()
            continue
        joined.add(asyncio.create_task(_join((reader, writer), near, first)))


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "serve":
        asyncio.run(_serve([int(port) for port in arguments]))
    else:
        asyncio.run(_site(arguments[0], int(arguments[1]), int(arguments[2])))
