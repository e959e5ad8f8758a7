"""The vault: a store's site as a process of its own, of another user, beside the Ray actor.

    frames.py     framed messages over a unix socket
    memory.py     how big vectors pass: in by a pipe, out by a sealed memory file
    transfer.py   the same in hashed pieces that go on after a cut, where there is no common memory
    guard.py      what a plan may cost, what a day may cost
    server.py     the process: who may connect, one request at a time, control beside it
    client.py     the actor's side: a Site's methods, carried to the vault
    place.py      its folders, its settings, and whether another user could change its code
    install.py    makes them; process.py starts it; commands.py is `raypipe vault ...`

What it is for: inside a Ray cluster whoever holds the token runs code as the actor's user, and can read what that
user can read. The vault's user is another one. Between the two there are only messages of the store protocol.
"""
