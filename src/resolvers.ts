export interface Resolvers<T> {
  promise: Promise<T>;
  resolve: (value: T) => void;
}

/** Promise.withResolvers(), which Node 20 does not have. */
export function withResolvers<T>(): Resolvers<T> {
  let resolve: (value: T) => void = () => {};
  const promise = new Promise<T>((done) => {
    resolve = done;
  });
  return { promise, resolve };
}
