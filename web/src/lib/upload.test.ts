import { describe, expect, it } from "vitest";
import { archiveType, nameOf } from "./upload";

describe("archiveType", () => {
  it("knows the archives that the server takes", () => {
    expect(archiveType("flowers.zip")).toBe("application/zip");
    expect(archiveType("Flowers.TAR.GZ")).toBe("application/gzip");
    expect(archiveType("flowers.txz")).toBe("application/x-xz");
  });
  it("is null of all else", () => expect(archiveType("flowers.rar")).toBeNull());
});

describe("nameOf", () => {
  it("is a name that the server takes", () => {
    expect(nameOf("My flowers (2).tar.gz")).toBe("my-flowers-2");
    expect(nameOf("cats.zip")).toBe("cats");
  });
});
