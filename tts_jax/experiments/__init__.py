"""The papers' figures: one module per paper, settings as data, data computed once, then drawn.

`SYSTEMS` is the list of them; a module is imported when it is asked for.
"""

import importlib
from typing import Any, NamedTuple


class System(NamedTuple):
    """What `tts-jax reproduce` knows of one paper.

    Attributes:
        paper: whose it is.
        modules: the modules of its experiments, each with `FIGURES`, `SETTINGS`, `settings_of` and
            `load_data`.
        figures: one line about each figure.
        quick: the settings of `--scale quick`.
        published: those of `--scale paper`.
        seeds: how many there are by default.
    """

    paper: str
    modules: tuple[str, ...]
    figures: dict[str, str]
    quick: str
    published: str
    seeds: str

    def homes(self) -> list[Any]:
        """Its modules, imported."""
        return [importlib.import_module(f"{__name__}.{name}") for name in self.modules]

    def specs(self) -> dict[str, Any]:
        """How each figure comes about, by name: a `FigureSpec`."""
        return {name: spec for home in self.homes() for name, spec in home.FIGURES.items()}


SYSTEMS: dict[str, System] = {
    "all": System(
        "Marion & Berthier (2023, arXiv 2304.09576)",
        ("marion_berthier", "additive"),
        {
            "figure1": "the notation",
            "figure2": "a sketch of the dynamics",
            "figure3": "networks in the two-timescale regime, ε = 2e-5",
            "figure4": "the same run against the gradient flow and the limits",
            "figure5": "one learning rate for both layers, ε = 1",
            "figure6": "two dimensions, target, network and neurons",
            "figure7": "box plot of the final loss against ε",
            "figure_2d": "the same for data in two dimensions, beside the published outcomes",
            "figure_10d": "in ten dimensions",
            "figure_relu": "for ReLU neurons",
            "proof": "a sketch of the proof's two phases",
        },
        "1e-3 for figures 3 and 4, the published quick configuration, the others as in the paper",
        "the paper's step size 1e-5 throughout, which is 1.75e8 steps for figures 3 and 4",
        "32, figure7 64, figure6 and the box plots after figure7 20, the sketches 1",
    ),
    "varpro": System(
        "Barboni, Peyré & Vialard (2025, arXiv 2504.18208)",
        ("varpro",),
        {
            "varpro_widths": "risk and distances against time for several widths",
            "varpro_penalty": "for several penalties λ, unbiased and biased",
            "varpro_gamma": "for several teachers",
            "varpro_two_timescale": "variable projection against two-timescale descent",
            "varpro_density": "the density of the features beside the ultra-fast diffusion",
        },
        "128 features, 512 data and 2048 epochs",
        "1024 features, 4096 data and 32,000 epochs",
        "4, at scale paper 2",
    ),
    "single_location": System(
        "Marion, Berthier, Biau & Boyer (2025, arXiv 2410.01537)",
        ("single_location",),
        {
            "single_location_published": "the five published experiments",
            "single_location_fast": "v faster than k",
            "single_location_schedule": "speeds of the schedule",
            "single_location_basins": "where starts end",
        },
        "the published steps, but a fifth of them on batches",
        "all of them, with more seeds of the sweeps",
        "30; the sweeps have numbers of their own",
    ),
    "takakura_suzuki": System(
        "Takakura & Suzuki (2024, arXiv 2403.14917)",
        ("takakura_suzuki",),
        {
            "takakura_suzuki_alignment": "kernel alignment and degrees of freedom in training, for "
            "several sizes of noise in the data",
            "takakura_suzuki_label_noise": "degrees of freedom and test error with label noise",
        },
        "5 dimensions, 150 features, 150 data and 1500 steps",
        "15 dimensions, 2000 features, 300 data and 10,000 steps",
        "3, at scale paper 5",
    ),
    "kim_suzuki": System(
        "Kim & Suzuki (2024, arXiv 2402.01258)",
        ("kim_suzuki",),
        {
            "kim_suzuki_joint": "attention trained with the features against attention eliminated",
            "kim_suzuki_saddle": "leaving a saddle, and the smallest curvature",
            "kim_suzuki_prompts": "prompts of finite length",
            "kim_suzuki_birth_death": "births and deaths, our variant",
        },
        "100 particles and 3 features in 10 dimensions",
        "500 particles and 5 features in 20 dimensions",
        "1",
    ),
    "implicit_diffusion": System(
        "Marion, Korba, Bartlett et al. (2025, arXiv 2402.05468)",
        ("implicit_diffusion",),
        {
            "implicit_diffusion_budget": "single and nested loops at one budget of sampling",
            "implicit_diffusion_weights": "weights of the modes beside the reduced flow",
            "implicit_diffusion_particles": "particles and density",
            "implicit_diffusion_ratio": "where the single loop leaves the reduced flow",
            "implicit_diffusion_penalty": "the divergence with both signs of the penalty",
        },
        "the published settings",
        "the same with more seeds and records",
        "2, at scale paper 8",
    ),
}


def system_of(figure: str) -> System:
    """The system that has a figure."""
    return next(system for system in SYSTEMS.values() if figure in system.figures)
