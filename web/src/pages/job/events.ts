/** Events of a job in words. */

import type { JobEvent } from "../../lib/live.svelte";

type Data = Record<string, unknown>;
const step = (data: Data, name = "step") => `step ${Number(data[name]).toLocaleString("en")}`;

const WORDS: Record<string, (data: Data) => string> = {
  created: (data) => `made as ${String(data.name)}`,
  claimed: (data) => `taken by ${String(data.worker)} (${String(data.device)}), attempt ${String(data.attempt)}`,
  state: (data) => `${String(data.from)} → ${String(data.to)}`,
  phase: (data) => String(data.name).replaceAll("_", " "),
  plan: (data) => `${step(data, "steps").replace("step ", "")} steps in ${String(data.epochs)} epochs, ${String(data.train_images)} images, ${String(data.device)}, ${String(data.precision)}, ${String(data.determinism)}`,
  metrics: (data) => (data.from_step === data.to_step ? step(data, "to_step") : `steps ${String(data.from_step)} to ${String(data.to_step)}`),
  evaluation: (data) => `${String(data.split)} after epoch ${String(data.epoch)}: ${scores(data.metrics as Data, String(data.split))}`,
  checkpoint: (data) => `${String(data.id)}${data.is_best ? ", the best so far" : ""}`,
  checkpoint_failed: (data) => `at ${step(data)}: ${String(data.detail)}`,
  checkpoint_skipped: (data) => `${String(data.id)}: ${String(data.detail)}`,
  resumed: (data) => `from ${data.checkpoint ? String(data.checkpoint) : "the start"}, ${step(data, "from_step")}`,
  rolled_back: (data) => `to ${step(data, "to_step")}: ${String(data.detail)}`,
  note: (data) => String(data.detail),
  artifact: (data) => String(data.name),
  attempt_ended: (data) => `attempt ${String(data.attempt)}: ${String(data.outcome)}`,
};

export function told(event: JobEvent): string {
  return WORDS[event.type]?.(event.data) ?? JSON.stringify(event.data);
}

function scores(metrics: Data, split: string): string {
  return ["loss", "top1"]
    .map((name) => [name, metrics[`${split}_${name}`]] as const)
    .filter(([, value]) => typeof value === "number")
    .map(([name, value]) => `${name} ${Number((value as number).toPrecision(4))}`)
    .join(", ");
}
