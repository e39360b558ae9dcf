import { fromFileUrl } from "@std/path/posix/from-file-url";

/** The repository's folder, with a slash at its end. */
export const ROOT = fromFileUrl(new URL("../..", import.meta.url));
