"""Trains and serves a team in several processes on a Ray cluster; the only room that imports ray.

A seat is one unit of the blueprint in a process of its own: policies with their optimizers and their engine, or a critic.
Environments, credit assignment, metric regressions and the run directory stay with the driver, the process of `collm train`.
Requests, episodes and credit travel; weights travel only into checkpoints and final folders.
With rollout workers, these play the environments and generate, and weights travel to them after every update.

    seats.py        what a seat's process holds and does
    hands.py        the driver's side: `SeatHands`, `SeatEngine`, `SeatTeam` in place of hands, engine, team of one process
    players.py      what a rollout worker's process does
    sharded.py      the driver's side: `Rollouts`, which hands shards to rollout workers
    heartbeat.py    names what a late iteration waits for
    places.py       which seat is on which device
    outlook.py      what a run in several places needs and gains, by arithmetic
    commands.py     runs of a study on the nodes
    deployments.py  a team on Ray Serve
    start.py        Ray: connects or starts, creates seats, ends
"""
