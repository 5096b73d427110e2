import { describe, expect, it } from "vitest";
import { groups, merged, readFrom, type Series } from "./curves";

const series = (name: string, steps: number[], scale = 1): Series => ({ name, total: steps.length, steps, values: steps.map((step) => step * scale) });
const event = (type: string, data: Record<string, unknown>) => ({ seq: 1, at: "", type, data });

describe("merged", () => {
  it("appends what is new and keeps what has not changed as it is", () => {
    const known = [series("lr", [1, 2, 3]), series("val_loss", [2])];
    const now = merged(known, [series("lr", [4, 5])], 3);
    expect(now[0]!.steps).toEqual([1, 2, 3, 4, 5]);
    expect(now[1]).toBe(known[1]);
  });
  it("repeats no point that is sent twice", () => {
    const once = merged([series("lr", [1, 2])], [series("lr", [3])], 2);
    expect(merged(once, [series("lr", [3])], 2)[0]!.steps).toEqual([1, 2, 3]);
  });
  it("drops an abandoned past", () => {
    const now = merged([series("lr", [1, 2, 3, 4])], [series("lr", [3], 10)], 2);
    expect(now[0]).toMatchObject({ steps: [1, 2, 3], values: [1, 2, 30] });
  });
  it("takes in a series that begins later", () => {
    expect(merged([series("lr", [1])], [series("val_loss", [2])], 1).map((one) => one.name)).toEqual(["lr", "val_loss"]);
  });
});

describe("readFrom", () => {
  it("is below the first step that any event speaks of", () => {
    const events = [event("metrics", { from_step: 12, to_step: 20 }), event("evaluation", { step: 11 }), event("phase", { name: "training" })];
    expect(readFrom(events)).toBe(10);
  });
  it("goes back with the trainer", () => {
    expect(readFrom([event("metrics", { from_step: 40, to_step: 40 }), event("rolled_back", { to_step: 30 })])).toBe(30);
  });
  it("is null without news", () => expect(readFrom([event("note", { detail: "x" })])).toBeNull());
});

describe("groups", () => {
  it("puts splits together, what matters most first, and leaves single scores out", () => {
    const names = ["weight_norm", "train_loss", "lr", "val_loss", "val_top1", "test_top1"];
    const found = groups(names.map((name) => series(name, [1, 2])));
    expect(found.map((one) => one.series.map((member) => member.name))).toEqual([["train_loss", "val_loss"], ["val_top1"], ["lr"], ["weight_norm"]]);
    expect(found.map((one) => one.isMain)).toEqual([true, true, true, false]);
  });
});
