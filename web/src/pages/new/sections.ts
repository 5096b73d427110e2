/** The settings of a job in the order in which one thinks of them; what the schema gains later comes last. */

import type { Field } from "./schema";

export interface Section {
  title: string;
  fields: Field[];
  isOpen: boolean;
}

const ORDER: [title: string, names: string[], isOpen: boolean][] = [
  ["Run", ["name", "epochs", "seed", "labels", "priority"], true],
  ["Data", ["data"], true],
  ["Model", ["model"], true],
  ["Loss", ["loss"], true],
  ["Optimizer", ["optimizer"], false],
  ["Learning rate", ["schedule"], false],
  ["Stability and speed", ["clip", "precision", "accumulate", "ema", "early_stopping", "on_divergence", "deterministic"], false],
  ["Telemetry, checkpoints and export", ["telemetry", "checkpoint", "export"], false],
  ["Resources, limits and retention", ["resources", "limits", "retention", "webhook"], false],
];

export function sections(fields: readonly Field[]): Section[] {
  const placed = new Set(ORDER.flatMap(([, names]) => names));
  const others = fields.filter((field) => !placed.has(field.name)).map((field) => field.name);
  const all: typeof ORDER = others.length ? [...ORDER, ["More", others, false]] : ORDER;
  return all.map(([title, names, isOpen]) => ({ title, isOpen, fields: names.flatMap((name) => fields.find((field) => field.name === name) ?? []) }));
}
