import { describe, expect, it } from "vitest";
import { copies, differing, python, quoted } from "./copies";

describe("copies", () => {
  it("quotes for a shell", () => expect(quoted("it's $HOME")).toBe(`'it'\\''s $HOME'`));
  it("writes Python", () => expect(python({ a: null, b: [true, 1.5], c: {} })).toBe(`{\n    "a": None,\n    "b": [\n        True,\n        1.5,\n    ],\n    "c": {},\n}`));
  it("names a key only where there are keys", () => {
    expect(copies({}, "http://x", true).curl).toContain("Bearer");
    expect(copies({}, "http://x", false).curl).not.toContain("Bearer");
  });
});

describe("differing", () => {
  it("sees changed, missing and equal leaves", () => {
    expect([...differing({ a: 1, b: [1], c: null }, { a: 2, b: [1], d: 0 })]).toEqual(["a", "c", "d"]);
  });
});
