"""AntMaze v2, D4RL's own rules, on Gymnasium's MuJoCo.

The ant is Gymnasium's with D4RL's time step, motors, contacts and capsules. `python
benchmarks/physics.py Ant_maze_*.hdf5` compares it with a recording, but none was available.
"""

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

from common.envs.d4rl_physics import restore_old_capsules

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
CELL = 4.0  # metres
WALL_HEIGHT = 2.0  # metres
GOAL_RADIUS = 0.5  # metres


class AntMaze(MujocoEnv):
    """An ant walks from one cell of a maze to another.

    Observation, float64 [29]: positions qpos[:15] and velocities qvel[:14], not scaled and without
    the goal, which lies in the same cell in every episode. Action [8]: torques in [-1, 1]. The
    reward is 1 within 0.5 m of the goal, where the episode ends, and 0 elsewhere.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, maze: str, **kwargs):
        self.cells = np.array([list(row.strip()) for row in MAZES[maze].split("\n")[1:]])
        space = gymnasium.spaces.Box(-np.inf, np.inf, (29,), np.float64)
        super().__init__("ant.xml", frame_skip=5, observation_space=space, **kwargs)
        (self.goal_cell,) = self.centres("G")

    def centres(self, kind: str) -> np.ndarray:
        """x and y of the centres of all cells of a kind, in metres from the start's: [cells, 2]."""
        offsets = np.argwhere(self.cells == kind) - np.argwhere(self.cells == "R")
        return CELL * offsets[:, ::-1]

    def _initialize_simulation(self):
        source = mujoco.MjSpec.from_file(self.fullpath)
        source.option.timestep = 0.02
        box, size = mujoco.mjtGeom.mjGEOM_BOX, (CELL / 2, CELL / 2, WALL_HEIGHT / 2)
        for x, y in self.centres("#"):
            pos = (x, y, WALL_HEIGHT / 2)
            source.worldbody.add_geom(type=box, pos=pos, size=size, contype=1, conaffinity=1)
        for geom in source.geoms:
            geom.solref, geom.solimp[:3] = (0.02, 1), (0.8, 0.8, 0.01)
        for motor in source.actuators:
            motor.gear[0] = 30
        model = source.compile()
        model.vis.global_.offwidth, model.vis.global_.offheight = self.width, self.height
        data = mujoco.MjData(model)
        restore_old_capsules(model, data, source)
        return model, data

    def reset_model(self):
        noise = self.np_random
        # D4RL moves the goal from its cell's centre in positive x and y, twice.
        self.goal = self.goal_cell + noise.uniform(0, 1, 2) + noise.uniform(0, 0.5, 2)
        qpos = self.init_qpos + noise.uniform(-0.1, 0.1, self.model.nq)
        mujoco.mj_normalizeQuat(self.model, qpos)  # older builds do this themselves
        self.set_state(qpos, self.init_qvel + 0.1 * noise.standard_normal(self.model.nv))
        return self._get_obs()

    def _get_obs(self):
        return np.concatenate([self.data.qpos[:15], self.data.qvel[:14]])

    def step(self, action):
        self.do_simulation(action, self.frame_skip)
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= GOAL_RADIUS)
        return self._get_obs(), float(reached), reached, False, {"success": reached}


for maze in MAZES:
    limit = 700 if maze == "umaze" else 1000
    name, kwargs = f"ssar-jax/AntMaze-{maze}-v2", {"maze": maze}
    gymnasium.register(name, f"{__name__}:AntMaze", max_episode_steps=limit, kwargs=kwargs)
