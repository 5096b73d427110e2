import { expect, test } from "vitest";
import type { Job } from "../../lib/api";
import { banded, csv, differences, groupsOf, valueAt, type Curve } from "./curves";

const curve = (job: string, x: number[], values: (number | null)[]): Curve => ({ job, run: `run "${job}"`, state: "running", total: x.length, x, values });
const job = (id: string, seed: number, alpha: number) => ({ id, spec: { seed, loss: { alpha } }, labels: { team: "vision" } }) as unknown as Job;

test("between points on a straight line, nowhere beyond them", () => {
  const one = curve("a", [0, 10], [0, 1]);
  expect(valueAt(one, 2.5)).toBeCloseTo(0.25);
  expect(valueAt(one, 10)).toBe(1);
  expect(valueAt(one, 11)).toBeNull();
  expect(valueAt(curve("b", [0, 10], [null, 1]), 5)).toBeNull();
});

test("a band of two runs: mean, sample deviation, and only the longer run after the shorter one's end", () => {
  const { x, y, band } = banded([curve("a", [0, 10], [1, 1]), curve("b", [0, 20], [3, 3])], "sd");
  expect([x[0], x[x.length - 1]]).toEqual([0, 20]);
  expect([y[0], y[y.length - 1]]).toEqual([2, 3]);
  expect(band!.high[0]! - 2).toBeCloseTo(Math.SQRT2);
  expect(band!.high.at(-1)).toBe(3);
  expect(banded([curve("a", [0, 1], [1, 1]), curve("b", [0, 1], [3, 3])], "range").band!.low[0]).toBe(1);
});

test("groups are what differs apart from the seed", () => {
  const jobs = [job("a", 0, 0.3), job("b", 1, 0.3), job("c", 0, 1)];
  expect(differences(jobs)).toEqual(["loss.alpha"]);
  expect([...groupsOf(jobs, "config").values()]).toEqual(["alpha=0.3", "alpha=0.3", "alpha=1"]);
  expect(groupsOf(jobs, "label.team").get("a")).toBe("team=vision");
});

test("CSV holds what is shown, names quoted", () => {
  const text = csv({ name: "val_top1", x: "step", has_more: false, data: [curve("a", [1], [0.5]), curve("b", [1], [0.6])] }, (id) => id === "a");
  expect(text).toBe('job,run,step,val_top1\na,"run ""a""",1,0.5\n');
});
