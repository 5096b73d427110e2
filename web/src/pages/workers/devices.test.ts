import { expect, it } from "vitest";
import { share } from "./devices";

it("is a share only where both are told", () => {
  expect(share(1, 4)).toBe(0.25);
  expect(share(0, 4)).toBe(0);
  expect(share(5, 4)).toBe(1);
  expect(share(null, 4)).toBeNull();
  expect(share(1, 0)).toBeNull();
});
