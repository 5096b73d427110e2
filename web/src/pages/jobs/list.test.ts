import { expect, test } from "vitest";
import { told } from "./bulk";
import { column, columnsOf, grouped, listPath, sorted, summary, type JobSummary } from "./list";

const NOW = Date.parse("2026-01-02T00:00:00Z");
const job = (id: string, more: Partial<JobSummary> = {}): JobSummary => ({
  id, name: id, state: "running", reason: null, metrics: { latest: {}, best: {} }, fields: {}, model: "resnet18", dataset: "digits", alpha: 1, seed: 0, epochs: 5,
  progress: { phase: null, epoch: 0, epochs: 5, step: 0, steps: null, fraction: 0, eta_s: null, images_per_s: null, ended_early: null },
  labels: {}, priority: 5, experiment: null, attempt: 1, worker: null, waiting_for: null, trained_seconds: 0, bytes: 0, created_at: "", started_at: null, finished_at: null, ...more,
});
const asked = (text: string) => new URL(listPath(new URLSearchParams(text), NOW), "http://h").searchParams;

test("the server is asked for the metrics and fields that columns, groups and order need, each once", () => {
  const query = asked("cols=name,best.val_top1,latest.val_top1,spec.loss.alpha&group=spec.loss.alpha&sort=best.val_loss");
  expect(query.getAll("metric")).toEqual(["val_top1", "val_loss"]);
  expect(query.getAll("field")).toEqual(["loss.alpha"]);
  expect(query.get("sort")).toBe("metrics.val_loss");
});

test("filters reach the server, a period as the moment it began, the last cursor alone", () => {
  const query = asked("state=running&state=failed&label.team=vision&since=24h&after=job_a&after=job_b&cols=name&q=x");
  expect(query.getAll("state")).toEqual(["running", "failed"]);
  expect(query.get("label.team")).toBe("vision");
  expect(query.get("created_after")).toBe("2026-01-01T00:00:00.000Z");
  expect(query.getAll("after")).toEqual(["job_b"]);
});

test("an order that the server does not know is made here, what is missing comes last both ways", () => {
  const jobs = [job("a", { epochs: 9 }), job("b", { progress: { ...job("b").progress, eta_s: 3 } }), job("c", { epochs: 10 })];
  expect(asked("sort=epochs").has("sort")).toBe(false);
  expect(sorted(jobs, "-epochs").map((one) => one.id)).toEqual(["c", "a", "b"]);
  expect(sorted(jobs, "eta").map((one) => one.id)[0]).toBe("b");
  expect(sorted(jobs, "-eta").map((one) => one.id)[0]).toBe("b");
  expect(sorted(jobs, "-best.val_top1")).toEqual(jobs);
});

test("groups keep the order of their first job and say mean and standard deviation", () => {
  const value = (id: string, alpha: number, top1: number) => job(id, { fields: { "loss.alpha": alpha }, metrics: { latest: {}, best: { val_top1: top1 } } });
  const groups = grouped([value("a", 0.3, 0.9), value("b", 1, 0.8), value("c", 0.3, 0.92)], "spec.loss.alpha");
  expect(groups.map((one) => [one.value, one.jobs.length])).toEqual([["0.3", 2], ["1", 1]]);
  expect(summary(groups[0]!.jobs, column("best.val_top1")!)).toBe("91.00 % ± 1.41 %");
  expect(summary(groups[0]!.jobs, column("model")!)).toBeNull();
});

test("unknown columns are left out, the name is always there", () => {
  expect(columnsOf(new URLSearchParams("cols=nonsense,label.team")).map((one) => one.key)).toEqual(["name", "label.team"]);
});

test("a bulk move is told with each reason once", () => {
  const refused = ["job_1", "job_2"].map((id) => ({ id, code: "illegal_move", detail: `${id} has ended` }));
  expect(told({ action: "cancel", done: ["x"], refused })).toBe("1 cancelled, 2 could not: the job has ended (2 times)");
  expect(told({ action: "pause", done: ["x", "y"], refused: [] })).toBe("2 paused.");
});
