import { describe, expect, it } from "vitest";
import { difference, probability, scale } from "./words";

describe("difference", () => {
  it("gives accuracies in points, with a sign", () => {
    expect(difference("val_top1", 0.0123)).toBe("+1.23 pp");
    expect(difference("val_loss", -0.5)).toBe("−0.5");
    expect(difference("val_top1", null)).toBe("–");
  });
});

describe("probability", () => {
  it("claims no more digits than there are", () => {
    expect(probability(0.00001)).toBe("< 0.001");
    expect(probability(0.0424)).toBe("0.042");
  });
});

describe("scale", () => {
  it("holds all intervals and zero", () => {
    const { at, ticks } = scale([{ low: 0.01, high: 0.05, mean: 0.03 }]);
    expect(at(0)).toBeGreaterThan(0);
    expect(at(0.05)).toBeLessThan(100);
    expect(ticks[0]).toBe(0);
  });
  it("stands without an interval", () => expect(scale([{ low: null, high: null, mean: 0 }]).at(0)).toBe(50));
});
