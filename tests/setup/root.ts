// Not by @std/path: the first scripts run before anything is fetched.
import { dirname } from "node:path";

/** The repository's folder, with a slash at its end. */
export const ROOT = `${dirname(dirname(import.meta.dirname!))}/`;
