/** The list of jobs as its address says: what to ask the server for, and how to show what it answers. */

import { address, type JobState } from "../../lib/api";
import { ago, bytes, duration, metric, setting, time } from "../../lib/format";

export interface JobSummary {
  id: string;
  name: string;
  state: JobState;
  reason: string | null;
  progress: {
    phase: string | null;
    epoch: number;
    epochs: number;
    step: number;
    steps: number | null;
    fraction: number;
    eta_s: number | null;
    images_per_s: number | null;
    ended_early: string | null;
  };
  metrics: { latest: Record<string, number | null>; best: Record<string, number | null> };
  fields: Record<string, unknown>;
  model: string;
  dataset: string;
  alpha: unknown;
  seed: number;
  epochs: number;
  labels: Record<string, string>;
  priority: number;
  experiment: string | null;
  attempt: number;
  worker: string | null;
  waiting_for: string | null;
  trained_seconds: number;
  bytes: number;
  created_at: string;
  started_at: string | null;
  finished_at: string | null;
}

export interface Column {
  key: string;
  title: string;
  /** Numbers stand to the right. */
  isNumber: boolean;
  value: (job: JobSummary) => unknown;
  text: (job: JobSummary, now: number) => string;
}

type Plain = [title: string, value: (job: JobSummary) => unknown, text?: (job: JobSummary, now: number) => string];

const NUMBERS = new Set(["eta", "images_per_s", "alpha", "seed", "epochs", "priority", "attempt", "trained_seconds", "bytes"]);
const PLAIN: Record<string, Plain> = {
  name: ["Job", (job) => job.name],
  state: ["State", (job) => job.state],
  progress: ["Progress", (job) => job.progress.fraction, (job) => `${Math.floor(job.progress.fraction * 100)} %`],
  eta: ["Left", (job) => job.progress.eta_s, (job) => duration(job.progress.eta_s)],
  images_per_s: ["Images/s", (job) => job.progress.images_per_s],
  model: ["Model", (job) => job.model],
  dataset: ["Data", (job) => job.dataset],
  alpha: ["Alpha", (job) => job.alpha],
  seed: ["Seed", (job) => job.seed],
  epochs: ["Epochs", (job) => job.epochs],
  labels: ["Labels", (job) => Object.entries(job.labels).map((pair) => pair.join("=")).sort().join(", ")],
  experiment: ["Experiment", (job) => job.experiment],
  priority: ["Priority", (job) => job.priority],
  attempt: ["Attempt", (job) => job.attempt],
  worker: ["Worker", (job) => job.worker],
  trained_seconds: ["Trained", (job) => job.trained_seconds, (job) => duration(job.trained_seconds)],
  bytes: ["Size", (job) => job.bytes, (job) => bytes(job.bytes)],
  created_at: ["Made", (job) => job.created_at, (job, now) => ago(job.created_at, now)],
  started_at: ["Began", (job) => job.started_at, (job) => time(job.started_at)],
  finished_at: ["Ended", (job) => job.finished_at, (job) => time(job.finished_at)],
  id: ["Id", (job) => job.id],
};

export const COLUMNS = Object.keys(PLAIN);
export const STANDARD = ["name", "state", "progress", "model", "dataset", "alpha", "best.val_top1", "trained_seconds", "created_at"];
export const METRICS = ["val_top1", "val_loss", "train_loss", "test_top1", "val_top5", "val_ece"];
const DERIVED = /^(best|latest|spec|label)\.(.+)$/;

function shown(value: unknown): string {
  return value === null || value === undefined || value === "" ? "–" : setting(value);
}

/** A column by its key: one of COLUMNS, or best.METRIC, latest.METRIC, spec.FIELD, label.KEY; null for any other. */
export function column(key: string): Column | null {
  const plain = PLAIN[key];
  if (plain) {
    const [title, value, text] = plain;
    return { key, title, isNumber: NUMBERS.has(key), value, text: text ?? ((job) => shown(value(job))) };
  }
  const [, kind, name] = DERIVED.exec(key) ?? [];
  if (!kind || !name) return null;
  if (kind === "best" || kind === "latest") {
    const value = (job: JobSummary) => job.metrics[kind][name];
    return { key, title: kind === "best" ? `Best ${name}` : name, isNumber: true, value, text: (job) => metric(name, value(job)) };
  }
  const value = (job: JobSummary) => (kind === "spec" ? job.fields[name] : job.labels[name]);
  return { key, title: name, isNumber: false, value, text: (job) => shown(value(job)) };
}

/** The columns that the address names; the name of the job is always among them. */
export function columnsOf(query: URLSearchParams): Column[] {
  const keys = query.get("cols")?.split(",") ?? STANDARD;
  return [...new Set(["name", ...keys])].map(column).filter((one) => one !== null);
}

export const PERIODS: Record<string, [string, number]> = {
  "1h": ["last hour", 3600],
  "24h": ["last 24 hours", 86_400],
  "7d": ["last 7 days", 7 * 86_400],
  "30d": ["last 30 days", 30 * 86_400],
};

/** What the server can sort by; all else is put in order here, within the page. */
export function serverSort(sort: string): string | null {
  if (sort === "-created_at") return sort;
  const [, falling, name] = /^(-?)best\.([A-Za-z0-9_]{1,64})$/.exec(sort) ?? [];
  return name === undefined ? null : `${falling}metrics.${name}`;
}

/** Metrics, and fields, that one line of a list can tell. */
const MOST_NAMED = 16;
const PASSED = ["state", "experiment", "q", "created_after", "created_before"];

/** The filters of the server's lists and comparisons that an address holds. now: ms since 1970. */
export function filters(query: URLSearchParams, now: number): Record<string, string[]> {
  const found: Record<string, string[]> = {};
  for (const [name, value] of query) if (PASSED.includes(name) || name.startsWith("label.")) (found[name] ??= []).push(value);
  const period = PERIODS[query.get("since") ?? ""];
  if (period) found["created_after"] = [new Date(now - period[1] * 1000).toISOString()];
  return found;
}

/** The server's address of the page that the dashboard's address means. now: ms since 1970. */
export function listPath(query: URLSearchParams, now: number): string {
  const sort = query.get("sort") ?? "-created_at";
  const keys = [...columnsOf(query).map((one) => one.key), query.get("group") ?? "", sort.replace(/^-/, "")];
  const named = (...kinds: string[]) => {
    const parts = keys.map((key) => DERIVED.exec(key)).filter((one) => one !== null);
    return [...new Set(parts.filter((one) => kinds.includes(one[1]!)).map((one) => one[2]!))];
  };
  return address("/v1/jobs", {
    view: "summary",
    limit: query.get("limit") ?? "100",
    after: query.getAll("after").at(-1),
    sort: serverSort(sort),
    metric: named("best", "latest").slice(0, MOST_NAMED),
    field: named("spec").slice(0, MOST_NAMED),
    ...filters(query, now),
  });
}

/** Numbers by size, words by alphabet; what is missing last in both directions. */
export function sorted(jobs: readonly JobSummary[], sort: string): JobSummary[] {
  const by = serverSort(sort) === null ? column(sort.replace(/^-/, "")) : null;
  if (!by) return [...jobs];
  const sign = sort.startsWith("-") ? -1 : 1;
  const missing = (value: unknown) => value === null || value === undefined || value === "";
  return [...jobs].sort((one, other) => {
    const [a, b] = [by.value(one), by.value(other)];
    if (missing(a) || missing(b)) return Number(missing(a)) - Number(missing(b));
    return sign * (typeof a === "number" && typeof b === "number" ? a - b : setting(a).localeCompare(setting(b), "en", { numeric: true }));
  });
}

export interface Group {
  /** The value that its jobs share, as text. */
  value: string;
  jobs: JobSummary[];
}

/** Jobs with the same value of a column together, groups in the order of their first job. */
export function grouped(jobs: readonly JobSummary[], key: string): Group[] {
  const by = column(key);
  if (!by) return [{ value: "", jobs: [...jobs] }];
  const groups = new Map<string, JobSummary[]>();
  for (const job of jobs) {
    const value = shown(by.value(job));
    const same = groups.get(value);
    if (same) same.push(job);
    else groups.set(value, [job]);
  }
  return [...groups].map(([value, members]) => ({ value, jobs: members }));
}

/** "91.2 % ± 0.3 (n = 5)" of a metric's column over a group; null if it is no metric or nobody has it. */
export function summary(jobs: readonly JobSummary[], by: Column): string | null {
  const [, kind, name] = DERIVED.exec(by.key) ?? [];
  if ((kind !== "best" && kind !== "latest") || !name) return null;
  const values = jobs.map(by.value).filter((value): value is number => typeof value === "number" && Number.isFinite(value));
  if (!values.length) return null;
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  if (values.length === 1) return metric(name, mean);
  const sd = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1));
  return `${metric(name, mean)} ± ${metric(name, sd)}`;
}
