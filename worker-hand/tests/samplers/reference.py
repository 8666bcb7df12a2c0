"""Makes cases.json and golden.safetensors beside it: schedules and trajectories of diffusers 0.42.1.

python worker-hand/tests/samplers/reference.py

The network of the trajectories is a formula, the same in `tests/samplers.rs`.
"""
import json
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file

STEPS = (1, 2, 4, 8, 20, 50)
COUNT = 24
CLASSES = {"ddim": "DDIMScheduler", "pndm": "PNDMScheduler", "euler": "EulerDiscreteScheduler", "euler-ancestral": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler",
           "dpmpp-2m": "DPMSolverMultistepScheduler", "dpmpp-2m-karras": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler", "lcm": "LCMScheduler"}
FLOW = "FlowMatchEulerDiscreteScheduler"
STABLE = {"beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
          "skip_prk_steps": True, "trained_betas": None}
# name -> (configuration as the file has it, samplers, even noise levels, mu)
CASES = {
    # Stable Diffusion 1.5 as published, and every sampler made from it.
    "sd15": ({**STABLE, "_class_name": "PNDMScheduler"}, tuple(CLASSES), False, None),
    "sdxl": ({**STABLE, "_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0, "timestep_spacing": "leading",
              "use_karras_sigmas": False}, tuple(CLASSES), False, None),
    "velocity": ({**STABLE, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": True, "clip_sample_range": 1.5}, tuple(CLASSES), False, None),
    "linspace": ({**STABLE, "_class_name": "PNDMScheduler", "timestep_spacing": "linspace", "set_alpha_to_one": True, "steps_offset": 0}, tuple(CLASSES), False, None),
    "cosine": ({"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "num_train_timesteps": 500},
               # Not Heun's: the second slope is a difference of large numbers over a small one.
               ("ddim", "euler", "dpmpp-2m", "dpmpp-2m-karras", "unipc"), False, None),
    "karras": ({**STABLE, "_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "timestep_spacing": "leading"}, ("euler", "heun", "dpmpp-2m", "unipc"), False, None),
    "no-signal": ({**STABLE, "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
                  ("ddim", "euler", "euler-ancestral", "dpmpp-2m", "unipc"), False, None),
    "sde": ({**STABLE, "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "euler_at_final": True, "final_sigmas_type": "sigma_min"},
            ("dpmpp-2m", "dpmpp-2m-karras", "euler"), False, None),
    "first-order": ({**STABLE, "_class_name": "DPMSolverMultistepScheduler", "solver_order": 1, "lower_order_final": False}, ("dpmpp-2m", "unipc"), False, None),
    "heun-solver": ({**STABLE, "_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun", "final_sigmas_type": "sigma_min", "lower_order_final": False}, ("dpmpp-2m",), False, None),
    "unipc-3": ({**STABLE, "_class_name": "UniPCMultistepScheduler", "solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min", "disable_corrector": [1]}, ("unipc",), False, None),
    "unipc-3-bh2": ({**STABLE, "_class_name": "UniPCMultistepScheduler", "solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False}, ("unipc",), False, None),
    "lcm": ({**STABLE, "_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0, "prediction_type": "epsilon"}, ("lcm",), False, None),
    # Sana's file as it is published has a number that JSON has not.
    "sana": ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "flow_shift": 3.0, "lambda_min_clipped": -float("inf"), "prediction_type": "flow_prediction",
              "use_flow_sigmas": True, "solver_order": 2}, ("dpmpp-2m", "unipc", "euler"), False, None),
    "sd3": ({"_class_name": FLOW, "num_train_timesteps": 1000, "shift": 3.0}, ("euler",), False, None),
    "z-image": ({"_class_name": FLOW, "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}, ("euler",), True, None),
    "flux": ({"_class_name": FLOW, "base_image_seq_len": 256, "base_shift": .5, "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True}, ("euler",), True, .83),
    "noisy-flow": ({"_class_name": FLOW, "shift": 1.5, "stochastic_sampling": True}, ("euler",), False, None),
}


def network(x, t):
    bias = torch.linspace(-.5, .5, COUNT)
    return torch.tanh(x * .7 + bias + t / 1000 * .4)


def scheduler(own, name):
    if name == "euler" and own.config.get("use_flow_sigmas"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=own.config.flow_shift)
    more = {"use_karras_sigmas": True} if name == "dpmpp-2m-karras" else {}
    if own.__class__.__name__ == FLOW:
        return own
    return getattr(diffusers, CLASSES[name]).from_config(own.config, **more)


def trigonometric(golden, cases):
    """Sana-Sprint's: its pipeline turns the network's answer, and its latents are half as large as those here."""
    made = diffusers.SCMScheduler()
    half = made.config.sigma_data
    for steps in STEPS:
        key = f"sprint/scm/{steps}"
        made.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
        made.set_begin_index(0)
        angles = made.timesteps
        share = torch.sin(angles[:-1]) / (torch.cos(angles[:-1]) + torch.sin(angles[:-1]))
        golden[f"{key}/times"], golden[f"{key}/levels"] = share, angles
        cases.append({"key": key, "config": "sprint", "sampler": "scm", "steps": steps, "even": False, "mu": None})
        if steps > 8:
            continue
        generator = torch.Generator().manual_seed(11)
        latent = torch.randn(1, COUNT, generator=generator) * half
        out = [latent / half]
        for angle, u in zip(angles, share):
            norm = torch.sqrt(u**2 + (1 - u) ** 2)
            x = latent / half * norm
            answer = ((1 - 2 * u) * x + (1 - 2 * u + 2 * u**2) * network(x, u)) / norm * half
            latent = made.step(answer, angle, latent, generator=generator, return_dict=False)[0]
            out.append(latent / half)
        golden[f"{key}/latents"] = torch.stack(out)


def main():
    golden, cases = {}, []
    trigonometric(golden, cases)
    for case, (config, samplers, even, mu) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "scheduler_config.json").write_text(json.dumps(config))
            own = getattr(diffusers, config["_class_name"]).from_pretrained(folder)
        for name in samplers:
            for steps in STEPS:
                key = f"{case}/{name}/{steps}"
                made = scheduler(own, name)
                flow = made.__class__.__name__ == FLOW
                more = {"mu": mu} if mu else {}
                if flow and even:
                    made.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **more)
                else:
                    made.set_timesteps(steps, **more)
                golden[f"{key}/times"] = made.timesteps.float()
                if hasattr(made, "sigmas"):
                    levels = made.sigmas.double().float()
                    golden[f"{key}/levels"] = torch.cat([levels[:1], levels[1:-1:2], levels[-1:]]) if name == "heun" and len(levels) > 2 else levels
                cases.append({"key": key, "config": case, "sampler": name, "steps": steps, "even": even and flow, "mu": mu})
                # Where the first two times are equal, diffusers begins at the second and runs off the end.
                if steps > 8 or (name != "pndm" and steps > 1 and made.timesteps[0] == made.timesteps[1]):
                    continue
                generator = torch.Generator().manual_seed(11)
                latent = torch.randn(1, COUNT, generator=generator) * (1.0 if flow else made.init_noise_sigma)
                out = [latent]
                for t in made.timesteps:
                    x = made.scale_model_input(latent, t) if hasattr(made, "scale_model_input") else latent
                    noisy = {"generator": generator} if "generator" in made.step.__code__.co_varnames else {}
                    latent = made.step(network(x, t), t, latent, **noisy, return_dict=False)[0]
                    out.append(latent)
                golden[f"{key}/latents"] = torch.stack(out)
    here = Path(__file__).parent
    save_file({k: v.contiguous() for k, v in golden.items()}, here / "golden.safetensors")
    (here / "cases.json").write_text(json.dumps({"configs": {"sprint": {"_class_name": "SCMScheduler", "prediction_type": "trigflow", "sigma_data": .5}, **{k: v[0] for k, v in CASES.items()}}, "cases": cases}, separators=(",", ":")).replace('},{"key"', '},\n{"key"') + "\n")
    print(len(cases), "cases", sum(v.numel() for v in golden.values()), "values")


if __name__ == "__main__":
    main()
