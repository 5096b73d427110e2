/** Who is signed in; without keys on the server everybody is "local". */

import { get, post, remove, type Schemas } from "./api";

class Session {
  who = $state<Schemas["SessionDocument"] | null>(null);
  needsKey = $state(false);
  isKnown = $state(false);

  constructor() {
    window.addEventListener("signed-out", () => {
      this.needsKey = true;
      this.who = null;
    });
  }

  async look(): Promise<void> {
    try {
      this.who = await get<Schemas["SessionDocument"]>("/v1/session");
      this.needsKey = false;
    } catch {
      // a refusal is told by `signed-out`; a server that is away is told by whatever page asks it next
    }
    this.isKnown = true;
  }

  async signIn(key: string): Promise<void> {
    this.who = await post<Schemas["SessionDocument"]>("/v1/session", { key });
    this.needsKey = false;
  }

  async signOut(): Promise<void> {
    await remove("/v1/session");
    this.who = null;
    this.needsKey = true;
  }

  may(scope: "submit" | "admin"): boolean {
    return this.who?.scopes.includes(scope) ?? false;
  }
}

export const session = new Session();
