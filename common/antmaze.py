"""AntMaze v2, D4RL's own rules, on Gymnasium's MuJoCo.

The ant is Gymnasium's, given D4RL's step, motors and contacts, and the capsules of the MuJoCo that
the data were recorded with (common/physics.py). Masses and rules are tested; that the simulator
follows recorded trajectories is not, for want of the data. With one of D4RL's files in this folder

    python -m common.physics Ant_maze_*.hdf5

replays its rows, one step each, and prints the error, which is near 0 if it does.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

from common.physics import restore_old_capsules

# #: wall, R: where the ant starts, G: the goal's cell. Rows along y, columns along x.
MAZES = {
    "umaze": """
        #####
        #R  #
        ### #
        #G  #
        #####""",
    "medium": """
        ########
        #R ##  #
        #  #   #
        ##   ###
        #  #   #
        # #  # #
        #   # G#
        ########""",
    "large": """
        ############
        #R   #     #
        # ## # # # #
        #      #   #
        # #### ### #
        #  # #     #
        ## # # # ###
        #  #   # G #
        ############""",
}
MAX_STEPS = {"umaze": 700, "medium": 1000, "large": 1000}
CELL = 4.0  # metres
WALL_HEIGHT = 2.0  # metres
GOAL_RADIUS = 0.5  # metres
DENSITY = 5.0  # kg/m³
ENV_ID = "ssar-jax/AntMaze-{maze}-v2"


class AntMaze(MujocoEnv):
    """An ant is to walk from one cell of a maze to another.

    Observation, float64 [29]: position and joint angles qpos[:15], velocities qvel[:14], neither
    scaled nor with the goal, which lies in the same cell in every episode. Action [8]: torques in
    [-1, 1]. Reward 1 within 0.5 m of the goal, where the episode ends, else 0. A time limit of 700
    steps (umaze) or 1000 is set where the environment is registered.
    """

    metadata = {
        "render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"],
        "render_fps": 10,
    }

    def __init__(self, maze: str, **kwargs):
        self.cells = np.array([list(row.strip()) for row in MAZES[maze].split("\n")[1:]])
        space = gymnasium.spaces.Box(-np.inf, np.inf, (29,), np.float64)
        super().__init__("ant.xml", frame_skip=5, observation_space=space, **kwargs)
        (self.goal_cell,) = self.centres("G")
        self.goal = self.goal_cell

    def centres(self, kind: str) -> np.ndarray:
        """x and y of the centres of all cells of a kind, in metres from the start's: [cells, 2]."""
        offsets = np.argwhere(self.cells == kind) - np.argwhere(self.cells == "R")
        return CELL * offsets[:, ::-1]

    def _initialize_simulation(self):
        model = mujoco.MjModel.from_xml_string(self._model_xml())
        model.vis.global_.offwidth, model.vis.global_.offheight = self.width, self.height
        data = mujoco.MjData(model)
        restore_old_capsules(model, data, DENSITY)
        return model, data

    def _model_xml(self) -> str:
        tree = ET.parse(self.fullpath)
        tree.find("option").set("timestep", "0.02")
        tree.find("default/geom").attrib |= {"solref": ".02 1", "solimp": ".8 .8 .01"}
        for motor in tree.iter("motor"):
            motor.set("gear", "30")
        world = tree.find("worldbody")
        size = f"{CELL / 2} {CELL / 2} {WALL_HEIGHT / 2}"
        for x, y in self.centres("#"):
            wall = {"type": "box", "pos": f"{x} {y} {WALL_HEIGHT / 2}", "size": size}
            ET.SubElement(world, "geom", wall | {"contype": "1", "conaffinity": "1"})
        return ET.tostring(tree.getroot(), encoding="unicode")

    def reset_model(self):
        noise = self.np_random
        # D4RL draws the goal towards positive x and y from its cell's centre, twice.
        self.goal = self.goal_cell + noise.uniform(0, 1, 2) + noise.uniform(0, 0.5, 2)
        qpos = self.init_qpos + noise.uniform(-0.1, 0.1, self.model.nq)
        mujoco.mj_normalizeQuat(self.model, qpos)  # as older builds did of themselves
        qvel = self.init_qvel + 0.1 * noise.standard_normal(self.model.nv)
        self.set_state(qpos, qvel)
        return self._get_obs()

    def _get_reset_info(self):
        return {"goal": self.goal.copy()}

    def _get_obs(self):
        return np.concatenate([self.data.qpos[:15], self.data.qvel[:14]])

    def step(self, action):
        self.do_simulation(action, self.frame_skip)
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= GOAL_RADIUS)
        if self.render_mode == "human":
            self.render()
        return self._get_obs(), float(reached), reached, False, {"success": reached}


for name, steps in MAX_STEPS.items():
    gymnasium.register(
        ENV_ID.format(maze=name),
        "common.antmaze:AntMaze",
        max_episode_steps=steps,
        kwargs={"maze": name},
    )
