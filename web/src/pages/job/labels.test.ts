import { describe, expect, it } from "vitest";
import { labelText, labelsOf } from "./labels";

describe("labels", () => {
  it("come back as they went", () => {
    const labels = { team: "vision", formula: "a=b", empty: "" };
    expect(labelsOf(labelText(labels))).toEqual(labels);
  });
  it("may have blank lines and spaces between them", () => expect(labelsOf("\n team = vision \n\n")).toEqual({ team: "vision" }));
  it("name the line that is none", () => expect(() => labelsOf("a=b\nvision")).toThrow("“vision”"));
});
