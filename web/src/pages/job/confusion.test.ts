import { describe, expect, it } from "vitest";
import { pairs } from "./confusion";

const class_names = ["cat", "dog"];

describe("pairs", () => {
  it("counts what lies beside the diagonal, most often first", () => {
    expect(pairs({ class_names, images: 20, matrix: [[9, 1], [4, 6]] }, 5)).toEqual([
      { truth: "dog", prediction: "cat", count: 4, share: 0.4 },
      { truth: "cat", prediction: "dog", count: 1, share: 0.1 },
    ]);
  });
  it("says the same of the short form", () => {
    const short = pairs({ class_names, images: 20, correct: [9, 6], mistakes: [[1, 0, 4], [0, 1, 1]] }, 1);
    expect(short).toEqual([{ truth: "dog", prediction: "cat", count: 4, share: 0.4 }]);
  });
});
