"""A world as someone else would write it: plain PettingZoo, text spaces of gymnasium, and no idea of collm."""

from __future__ import annotations

import string

from gymnasium.spaces import Text
from pettingzoo import ParallelEnv

LAMPS = ("red", "green", "blue", "white")


class Harbour(ParallelEnv):
    """The keeper lights a lamp while the pilot, who cannot see it yet, hoists one; the same colour scores a point. The keeper
    then goes home, and the pilot, out at sea, scores a point for the keeper's colour in every further round till time runs out.
    """

    metadata = {"name": "harbour_v0", "render_modes": []}  # noqa: RUF012

    def __init__(self, rounds: int = 3):
        self.rounds = rounds
        self.possible_agents = ["keeper", "pilot"]
        self.render_mode = None
        said = Text(min_length=1, max_length=80, charset=string.printable)
        named = Text(min_length=0, max_length=20, charset=string.ascii_letters + " ")
        self.observation_spaces = dict.fromkeys(self.possible_agents, said)
        self.action_spaces = dict.fromkeys(self.possible_agents, named)

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None, options=None):
        self.agents = self.possible_agents[:]
        self.round = 0
        self.lamp = None
        colours = " ".join(LAMPS)
        return {agent: f"You are the {agent}. Name one colour.\nColours: {colours}" for agent in self.agents}, {
            agent: {} for agent in self.agents
        }

    def step(self, actions):
        if self.round == 0:
            self.lamp = actions["keeper"].strip().lower()
        point = float(self.lamp in LAMPS and actions["pilot"].strip().lower() == self.lamp)
        acting = self.agents
        self.round += 1
        over = self.round == self.rounds
        observations = {agent: "Ahoy! Again." if point else "No lamp in sight. Again." for agent in acting}
        rewards = {agent: point for agent in acting}
        terminations = {agent: agent == "keeper" for agent in acting}
        truncations = {agent: agent == "pilot" and over for agent in acting}
        self.agents = [] if over else ["pilot"]
        return observations, rewards, terminations, truncations, {agent: {} for agent in acting}
