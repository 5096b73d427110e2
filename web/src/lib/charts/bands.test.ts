import { describe, expect, it } from "vitest";
import { band } from "./bands";

describe("band", () => {
  it("is the mean and the spread of n − 1", () => {
    const found = band([{ x: [1, 2], values: [1, 3] }, { x: [1, 2], values: [3, 3] }]);
    expect(found.x).toEqual([1, 2]);
    expect(found.mean).toEqual([2, 3]);
    expect(found.high[0]).toBeCloseTo(2 + Math.SQRT2);
    expect(found.low[1]).toBe(3);
  });
  it("draws straight lines between points that only some have", () => {
    expect(band([{ x: [0, 10], values: [0, 10] }, { x: [0, 5, 10], values: [0, 7, 10] }]).mean).toEqual([0, 6, 10]);
  });
  it("counts a curve only where it is, and no gap as a value", () => {
    const found = band([{ x: [1, 2, 3], values: [1, null, 1] }, { x: [1], values: [3] }]);
    expect(found.x).toEqual([1, 3]);
    expect(found.mean).toEqual([2, 1]);
  });
  it("of nothing is nothing", () => expect(band([]).x).toEqual([]));
});
